"""The block and its stochastic depth against a slow computation, image by image."""

from collections import Counter

import pytest
import torch
from torch import nn

from dinov2.layers import Block, SwiGLUFFNFused
from dinov2.layers.stochastic_depth import add_branch, draw_orders
from tests.helpers.backbones import randomise

SEGMENTS = ((6, 5), (5, 3))
T, D = 45, 8


def random_block(**kwargs) -> Block:
    return randomise(Block(D, num_heads=2, qkv_bias=True, init_values=1.0, **kwargs)).double()


def images_of(x, segments):
    """First row and rows of each image, segment by segment."""
    start = 0
    for batch, tokens in segments:
        yield [x[start + i * tokens : start + (i + 1) * tokens] for i in range(batch)]
        start += batch * tokens


def slow_branch(x, branch, kept):
    """x[kept] + (B / k) f(x[kept]), one image at a time; ``kept`` is a list of image numbers per segment."""
    out = []
    for images, numbers in zip(images_of(x, SEGMENTS), kept, strict=True):
        for i, image in enumerate(images):
            out.append(image + len(images) / len(numbers) * branch(image) if i in numbers else image)
    return torch.cat(out)


def slow_block(block, x, kept):
    def attention(image):
        return block.ls1(block.attn(block.norm1(image), ((1, len(image)),)))

    def feed_forward(image):
        return block.ls2(block.mlp(block.norm2(image)))

    return slow_branch(slow_branch(x, attention, kept[0]), feed_forward, kept[1])


def kept_images(orders, count):
    """Per branch and segment the numbers of the images it keeps."""
    return [[order[branch, 0, :count].tolist() for order in orders] for branch in (0, 1)]


@pytest.mark.parametrize("options", [{}, {"ffn_layer": SwiGLUFFNFused}, {"inverse_gather": False}])
def test_stochastic_depth_computes_the_kept_images_alone(options):
    block = random_block(drop_path=0.4, **options)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    orders = draw_orders(SEGMENTS, 2, x.device)
    # floor(6 * 0.6) = 3 and floor(5 * 0.6) = 3 images are kept.
    kept = kept_images(orders, 3)
    out, expected = block(x, SEGMENTS, orders), slow_block(block, x, kept)
    torch.testing.assert_close(out, expected)

    inputs, direction = [x, *block.parameters()], torch.randn_like(out)
    grads = torch.autograd.grad((out * direction).sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad((expected * direction).sum(), inputs))


@pytest.mark.parametrize(("rate", "orders"), [(0.0, True), (0.4, False)], ids=["p=0", "evaluation"])
def test_without_drop_path_every_image_is_computed(rate, orders):
    block = random_block(drop_path=rate)
    x = torch.randn(T, D, dtype=torch.float64)
    out = block(x, SEGMENTS, draw_orders(SEGMENTS, 2, x.device) if orders else None)
    everything = [range(6), range(5)]
    torch.testing.assert_close(out, slow_block(block, x, [everything, everything]))


@pytest.mark.parametrize(("batch", "count"), [(96, 57), (384, 230), (1, 1), (2, 1)])
def test_kept_counts_at_p_04(batch, count):
    # The recipe's global and local batches, and the smallest ones.
    segments, seen = ((batch, 2),), []

    def branch(rows, kept):
        seen.append((rows.shape, kept))
        return torch.ones_like(rows)

    out = add_branch(torch.zeros(2 * batch, D), branch, segments, [draw_orders(segments, 1, "cpu")[0][0]], 0.4)
    assert seen == [((2 * count, D), ((count, 2),))]
    assert Counter(out.flatten().tolist()) == {
        **({0.0: 2 * D * (batch - count)} if batch > count else {}),
        torch.tensor(batch / count).item(): 2 * D * count,
    }


def test_updates_are_unbiased_over_draws():
    draws, batch = 4000, 5
    orders = draw_orders(((batch, 1),), draws, "cpu")[0]
    assert (orders[:, 0].sort(dim=1).values == torch.arange(batch)).all()
    total = torch.zeros(batch, 1, dtype=torch.float64)
    for order in orders:
        total += add_branch(torch.zeros_like(total), lambda rows, _: torch.ones_like(rows), ((batch, 1),), [order], 0.4)
    # Three of five are kept: each update is 5/3 with probability 3/5, its deviation sqrt(2/3).
    deviation = (2 / 3 / draws) ** 0.5
    assert ((total / draws - 1).abs() < 4.5 * deviation).all()


def test_branches_and_segments_draw_independently():
    first, second = draw_orders(((50, 1), (50, 1)), 2, "cpu")
    assert len({tuple(order[0].tolist()) for order in (*first, *second)}) == 4


def test_segments_equal_separate_calls():
    block = random_block()
    x = torch.randn(T, D, dtype=torch.float64)
    parts = [block(rows, (segment,)) for rows, segment in zip(x.split([30, 15]), SEGMENTS, strict=True)]
    torch.testing.assert_close(block(x, SEGMENTS), torch.cat(parts))


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_wanted_rows_are_those_of_the_whole_block(rate):
    """Class tokens of all images, some patches, one of them twice with weight 0, as padding is."""
    block = random_block(drop_path=rate, ffn_layer=SwiGLUFFNFused)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    orders = draw_orders(SEGMENTS, 2, x.device)
    wanted = torch.tensor([*range(0, 30, 5), *range(30, 45, 3), 2, 3, 17, 18, 29, 2])
    weight = torch.randn(len(wanted), D, dtype=torch.float64)
    weight[-1] = 0
    out, expected = block(x, SEGMENTS, orders, wanted), block(x, SEGMENTS, orders)[wanted]
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    inputs = [x, *block.parameters()]
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [None, 0.0])
def test_layer_scale_can_be_left_out(value):
    block = Block(D, num_heads=2, init_values=value)
    assert isinstance(block.ls1, nn.Identity) and isinstance(block.ls2, nn.Identity)


def test_residual_keeps_its_precision():
    x = torch.randn(T, D)
    block = randomise(Block(D, num_heads=2, qkv_bias=True, init_values=1.0, drop_path=0.4))
    orders = draw_orders(SEGMENTS, 2, x.device)
    expected = block(x, SEGMENTS, orders)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = block(x, SEGMENTS, orders)
    gathered = block.bfloat16()(x, SEGMENTS, orders)  # as sharding gathers parameters
    for out in (autocast, gathered):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, rtol=0, atol=0.1)
        assert (out == expected).float().mean() < 0.9
        # What no branch has touched has not been rounded.
        untouched = (expected == x).all(dim=1)
        assert untouched.any() and (out[untouched] == x[untouched]).all()
