"""The bench: a real training run, and an honest account of where its time goes.

Start it as a module: ``python -m fastrunner.bench --help``.
"""
