"""Which commit of the source is measured."""

import subprocess
from pathlib import Path


def source_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of this package, with `-dirty` if files differ from it.

    Args:
        file: One of the package.

    Returns:
        None where git has no such file, as in an environment within somebody else's repository.
    """
    git = ["git", "-C", str(file.parent)]
    try:
        for command in (
            ["ls-files", "--error-unmatch", file.name],
            ["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        ):
            answer = subprocess.run([*git, *command], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
