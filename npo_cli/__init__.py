"""Near-Future Policy Optimization: a policy taught by its own near future (arXiv 2604.20733)."""

__version__ = "0.1.0"
