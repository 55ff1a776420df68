"""Versions: of the API that this package implements, and of the project itself."""

__version__ = "2.8.3"
PROJECT_VERSION = "0.1.0"
