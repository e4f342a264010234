"""Everything of which a run can have another one: one line here registers a new file.

`docs/extending.md` shows an addition of each kind as a diff. Modules are imported when a run names the part.
"""

from dinov2.utils.registry import Registry

LOSSES = Registry(
    "loss",
    {
        "dino": "dinov2.loss.dino:DINO",
        "ibot": "dinov2.loss.ibot:IBOT",
        "kde": "dinov2.loss.spreading:KDE",
        "koleo": "dinov2.loss.spreading:KoLeo",
        "gram": "dinov2.loss.gram:Gram",
        "distillation": "dinov2.loss.distillation:Distillation",
    },
)
"""Terms of the objective: `dinov2.loss.term.LossTerm`."""

BUILT_IN_LOSSES = ("dino", "ibot", "kde", "koleo")
"""Those that sections ``dino`` and ``ibot`` set, in the order in which they are added up; ``losses`` names others."""

AUGMENTATIONS = Registry(
    "augmentation step",
    {
        "flips": "dinov2.data.augment.steps.flips:Flips",
        "rotate90": "dinov2.data.augment.steps.rotate90:Rotate90",
        "hed": "dinov2.data.augment.steps.hed:Hed",
        "jitter": "dinov2.data.augment.steps.jitter:Jitter",
        "grayscale": "dinov2.data.augment.steps.grayscale:Grayscale",
        "blur": "dinov2.data.augment.steps.blur:Blur",
        "rand_stain": "dinov2.data.augment.steps.rand_stain:RandStain",
        "solarize": "dinov2.data.augment.steps.solarize:Solarize",
    },
)
"""Steps of the augmentation after the crop: `dinov2.data.augment.step.AugmentationStep`."""

BUILT_IN_STEPS = ("flips", "hed", "jitter", "grayscale", "blur")
"""Those of the published recipe in their order of application, set by keys of the section ``augmentation`` itself;
``augmentation.steps`` names further ones."""

SOURCES = Registry(
    "kind of data",
    {
        "parquet": "dinov2.build.sources.parquet:ParquetShards",
        "sample_list": "dinov2.build.sources.sample_list:SampleList",
        "image_list": "dinov2.build.sources.images:ImageList",
        "slides": "dinov2.build.sources.slides:Slides",
        "tar": "dinov2.build.sources.images:TarFiles",
        "zip": "dinov2.build.sources.images:ZipFiles",
        "hdf5": "dinov2.build.sources.images:Hdf5Files",
        "images": "dinov2.build.sources.images:ImageFolder",
    },
)
"""Kinds of data, in the order in which a path is recognised: `dinov2.data.source.SourceKind`."""

TISSUE_RULES = Registry(
    "tissue rule",
    {
        "hsv": "dinov2.data.slides.tissue_rules:Hsv",
        "otsu": "dinov2.data.slides.tissue_rules:Otsu",
        "mask": "dinov2.data.slides.tissue_rules:Given",
        "none": "dinov2.data.slides.tissue_rules:Everything",
    },
)
"""Rules of which pixels of a slide are tissue: `dinov2.data.slides.tissue_rules.PixelRule`."""

BACKBONES = Registry(
    "backbone",
    {
        **{
            f"vit_{size}": f"dinov2.models.vision_transformer:vit_{size}"
            for size in ("demo", "shallow", "tiny", "small", "base", "large", "huge", "giant2")
        },
        **{
            f"dinov3_{size}": f"dinov2.models.dinov3:dinov3_{size}"
            for size in ("vits16", "vits16plus", "vitb16", "vitl16", "vitl16plus", "vith16plus", "vit7b16")
        },
        "dinov3_vit": "dinov2.models.dinov3:Dinov3VisionTransformer",
    },
)
"""Networks that turn images into tokens: `dinov2.models.backbone.Backbone`."""

PROBES = Registry(
    "probe",
    {
        "knn": "dinov2.eval.probe.nearest:Knn",
        "linear_eva": "dinov2.eval.probe.linear:LinearEva",
        "linear_kaiko": "dinov2.eval.probe.linear:LinearKaiko",
        "logistic": "dinov2.eval.probe.logistic:Logistic",
        "few_shot": "dinov2.eval.probe.nearest:FewShot",
        "rankme": "dinov2.eval.probe.spread:RankMe",
        "odcorr": "dinov2.eval.probe.spread:ODCorr",
    },
)
"""Measures of a teacher's features: `dinov2.eval.probe.task.Probe`."""

EXPORTS = Registry(
    "format",
    {
        "meta": "dinov2.hub.export.meta:Meta",
        "timm": "dinov2.hub.export.timm:Timm",
        "hf": "dinov2.hub.export.transformers:Transformers",
        "onnx": "dinov2.hub.export.onnx:Onnx",
    },
)
"""Formats in which teachers are exported for other libraries: `dinov2.hub.export.layout.Layout`."""

SINKS = Registry(
    "sink of metrics",
    {
        "wandb": "dinov2.logging.sinks:WandbSink",
        "tensorboard": "dinov2.logging.tensorboard:TensorBoardSink",
        "mlflow": "dinov2.logging.mlflow:MlflowSink",
    },
)
"""Receivers of records beside the console and ``metrics.jsonl``: `dinov2.logging.sinks.Sink`, made of output folder,
``logging.wandb_project`` and configuration."""
