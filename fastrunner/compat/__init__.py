"""Other projects' import paths, with fastrunner's objects behind them."""
