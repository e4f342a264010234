"""The training split of a Hugging Face dataset."""

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

logger = logging.getLogger(__name__)

CARD = "README.md"
_SPLIT_WORDS = ("-of-", "train", "val", "dev", "test", "eval")  # a split's name holds one; `datasets` loads slowly
_NAMED = 5  # files named in a line


def find_train_files(dataset: str, names: Sequence[str], card: str, example: str = "") -> list[str]:
    """Pick the Parquet files that `datasets.load_dataset(dataset, split="train")` reads.

    That package knows the rules: the configurations of the dataset's card, else folders and files named after
    splits, else everything. It applies them to a folder, so an empty copy of the listing is made for it; asked
    about the hub itself it would list the dataset once for each of its patterns.

    `names` are relative to the dataset; `card` is the text of its README.md, or empty; `example` is how its files may
    be named one by one. What is left out is logged. ValueError if the card cannot be understood or leaves open what
    to read, or no split is called train.
    """
    chosen = _choose(
        dataset, names, card, f"name the files instead, as in {example or f'hf://datasets/{dataset}/folder'}"
    )
    if chosen and (others := sorted(set(names) - set(chosen))):
        named = ", ".join(others[:_NAMED]) + (f" and {len(others) - _NAMED} more" if len(others) > _NAMED else "")
        counts = f"{len(chosen)} of {len(names)} files"
        logger.warning("dataset '%s': %s are its split train; left out: %s", dataset, counts, named)
    return chosen


def _choose(dataset: str, names: Sequence[str], card: str, advice: str) -> list[str]:
    config = _default_config(dataset, card, advice)
    if not config and any(name != name.lower() for name in names):
        # `datasets` does not know Train and Test, and would take both.
        lower = {name.lower(): name for name in names}
        if len(lower) == len(names) and not lower.keys() <= set(names):
            return sorted(lower[name] for name in _choose(dataset, list(lower), card, advice))
    if not config and not any(word in name for name in names for word in _SPLIT_WORDS):
        # Everything, then; thousands of slides need not be copied and searched for that.
        return sorted(name for name in names if not any(part[:2] == "__" for part in Path(name).parts[:-1]))
    from datasets.data_files import get_data_patterns, resolve_pattern, sanitize_patterns

    suffixes = sorted({Path(name).suffix for name in names})
    with TemporaryDirectory(prefix="path-fm-") as folder:
        for name in filter(_stays_inside, names):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        base = str(Path(folder, config.get("data_dir") or ""))
        try:
            splits = sanitize_patterns(config["data_files"]) if "data_files" in config else get_data_patterns(base)
        except FileNotFoundError:
            return []
        if "train" not in splits:
            given = ", ".join(map(str, splits))
            raise ValueError(f"dataset '{dataset}' has the splits {given}, none is train; {advice}")
        found = set()
        for pattern in splits["train"]:
            if "://" in pattern or not _stays_inside(pattern):
                raise ValueError(f"the card of dataset '{dataset}' names files elsewhere, '{pattern}'; {advice}")
            with suppress(FileNotFoundError):  # one pattern of several may match nothing
                found.update(resolve_pattern(pattern, base, allowed_extensions=suffixes))
        return sorted(Path(path).relative_to(folder).as_posix() for path in found)


def _default_config(dataset: str, card: str, advice: str) -> dict[str, Any]:
    """Parameters of the configuration that is read where none is named; {} if the card lists none."""
    if not card.lstrip().startswith("---"):
        return {}
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard(card, ignore_metadata_errors=True).data)
        name = configs.get_default_config_name()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"the card of dataset '{dataset}' cannot be understood ({text}); {advice}") from error
    if configs and name is None:
        raise ValueError(f"dataset '{dataset}' has the configurations {', '.join(configs)}, no default; {advice}")
    return configs[name] if name else {}


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
