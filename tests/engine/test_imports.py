"""The engine and the bookkeeping of the cache import no torch."""

import subprocess
import sys


def test_no_torch() -> None:
    code = (
        "import sys, tokenmill.engine.core, tokenmill.engine.events, tokenmill.kv_cache.manager; "
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
