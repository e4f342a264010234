"""Look at a Parquet dataset before training on it: python -m dinov2.data.inspect SRC"""

from dinov2.data.inspect.command import main

if __name__ == "__main__":
    raise SystemExit(main())
