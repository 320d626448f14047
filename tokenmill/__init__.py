"""tokenmill compiles and serves large language models. The public API is what `__all__` lists."""

from tokenmill.version import __version__

__all__ = ["__version__"]
