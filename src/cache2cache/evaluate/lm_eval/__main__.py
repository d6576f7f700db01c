"""The harness's own command line, which knows the model `c2c` now."""

from lm_eval.__main__ import cli_evaluate

import cache2cache.evaluate.lm_eval  # noqa: F401

if __name__ == "__main__":
    cli_evaluate()
