"""What is raised for a compressed folder that cannot be read."""


class CompressedFileError(ValueError):
    """The folder of a compressed module is damaged, is of another version, or does not fit the module."""
