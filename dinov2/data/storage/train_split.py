"""The training split of a Hugging Face dataset."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any


def find_train_files(dataset: str, names: Sequence[str], card: str) -> list[str]:
    """Pick the Parquet files that `datasets.load_dataset(dataset, split="train")` reads.

    That package knows the rules: the configurations of the dataset's card, else folders and files named after
    splits, else everything. It applies them to a folder, so an empty copy of the listing is made for it; asked
    about the hub itself it would list the dataset once for each of its patterns.

    `names` are relative to the dataset; `card` is the text of its README.md, or empty. ValueError if the card cannot
    be understood or leaves open what to read, or no split is called train.
    """
    from datasets.data_files import SPLIT_KEYWORDS, get_data_patterns, resolve_pattern, sanitize_patterns

    advice = f"name the files instead, as in hf://datasets/{dataset}/folder"
    config = _default_config(dataset, card, advice)
    words = {"-of-", *(word for keywords in SPLIT_KEYWORDS.values() for word in keywords)}
    if not config and not any(word in name for name in names for word in words):
        # Everything, then; thousands of slides need not be copied and searched for that.
        return sorted(name for name in names if not any(part[:2] == "__" for part in Path(name).parts[:-1]))
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
                found.update(resolve_pattern(pattern, base, allowed_extensions=[".parquet"]))
        return sorted(Path(path).relative_to(folder).as_posix() for path in found)


def _default_config(dataset: str, card: str, advice: str) -> dict[str, Any]:
    """Parameters of the configuration that is read where none is named; {} if the card lists none."""
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    if not card.lstrip().startswith("---"):
        return {}
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
