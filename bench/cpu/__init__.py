"""Ours beside other engines on whole language models, on a CPU: `python -m bench.cpu`. See bench/README.md."""
