"""The error of this room."""


class ArtifactError(ValueError):
    """Weights that cannot be stored, or a file that is no sound artifact; the message is one line."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ArtifactError(message)
