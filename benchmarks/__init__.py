"""The benchmark suite, installed as ``igulora.benchmarks``: frozen cases, the methods compared, runners, and what renders their results.

``gpu_*.py``, ``compile*.py``, ``render*.py`` and the other files with a command line are scripts: they are run by their paths.
"""
