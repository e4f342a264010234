"""Look at a Parquet dataset before training on it: python -m dinov2.data.inspect SRC"""

import sys

if __name__ == "inspect":
    # Python started in, or with a script of, this folder takes this file for the standard library's module.
    import importlib.util
    import os

    _spec = importlib.util.spec_from_file_location(
        __name__, os.path.join(os.path.dirname(os.__file__), "inspect.py")
    )
    sys.modules[__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
else:
    from dinov2.data.inspect_command import main

    if __name__ == "__main__":
        raise SystemExit(main())
