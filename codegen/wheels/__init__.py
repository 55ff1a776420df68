"""The published wheels: what their names say, the index that lists them, and one taken instead of a build."""
