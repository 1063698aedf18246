"""The order of the house: what each folder may import, and which C++ folder may include which."""

# From the ground up. A line imports from itself and from the lines above it; the rooms of one line import nothing of
# each other. A name with "=" is that module alone, without what lies below it. "*" is any name.
LAYERS = (
    ("patchsparse",),
    ("=spatspark_fast",),
    ("spatspark_fast.common",),
    ("spatspark_fast.scores", "spatspark_fast.data", "spatspark_fast.models"),
    ("spatspark_fast.training",),
    ("spatspark_fast.forecast",),
    ("spatspark_fast.evaluate",),
    ("spatspark_fast.pretrain", "spatspark_fast.finetune", "spatspark_fast.prepare", "spatspark_fast.info"),
    ("spatspark_fast.experiments",),
    ("=spatspark_fast.__getattr__", "=spatspark_fast.__main__"),
    ("benchmarks.measure",),
    ("benchmarks.subjects",),
    ("benchmarks.peers",),
    ("benchmarks.reports", "benchmarks.gpu"),
    ("=benchmarks", "=benchmarks.conftest", "=benchmarks.__main__", "benchmarks.test_*"),
    ("scripts",),
    ("tests",),
)
KERNEL_LAYERS = (
    ("patchsparse.eager",),
    ("patchsparse.geometry", "patchsparse.maps"),
    (
        "patchsparse.grid",
        "patchsparse.layout",
        "patchsparse.onednn",
        "patchsparse.capturing",
        "patchsparse.precision",
        "patchsparse.processor",
    ),
    ("patchsparse.backends",),
    ("patchsparse.ops",),
    ("patchsparse.packing", "patchsparse.pointwise"),
    ("patchsparse.functional",),
    ("patchsparse.whole_images",),
    ("patchsparse.adoption", "patchsparse.explanation"),
    ("patchsparse.testing",),
    ("=patchsparse",),
)
COMMANDS = ("pretrain", "finetune", "prepare", "evaluate", "forecast", "experiments", "info")
NO_COMMANDS = ("spatspark_fast.common.", "spatspark_fast.training.")
CPP_LAYERS = (
    ("=csrc/engine.h",),
    ("csrc/kernels",),
    ("csrc/runtime",),
    ("csrc/plan",),
    ("csrc/ops",),
    ("=csrc/engine.cpp",),
)
