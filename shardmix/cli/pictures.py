"""Pictures of profiles, drawn by a process of its own."""

import importlib.util
import sys
from pathlib import Path

from shardmix.errors import OutputError, RecipeError, one_line

_SUFFIXES = (".svg", ".png", ".pdf")
_MOST_SECONDS = 300


def profile_files(asked: Path | None) -> tuple[Path | None, Path | None]:
    """Return the path of `--profile`'s figures, and that of the picture if one was asked for.

    Raises `ShardmixError` if it could not be drawn or would destroy something. This comes first,
    since after the merge it is too late.
    """
    if asked is None or asked.suffix == ".json":
        return asked, None
    if asked.suffix not in _SUFFIXES:
        raise RecipeError(
            f"must end in .json (figures), or in {', '.join(_SUFFIXES)} (a picture, and the "
            "figures beside it)",
            subject=f"--profile {str(asked)!r}",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError(
            "a picture takes matplotlib, which is not installed",
            subject=f"--profile {str(asked)!r}",
            remedy="pip install 'shardmix[profile]', or name a .json file for only the figures",
        )
    from shardmix.profiling.profile_file import is_profile

    figures = asked.with_suffix(".json")
    # With its figures beside it, it is the picture of an earlier merge.
    is_there = asked.is_symlink() or asked.exists()
    if is_there and not (asked.is_file() and not asked.is_symlink() and is_profile(figures)):
        raise OutputError(
            "exists and is not the picture of a profile; nothing else would be replaced",
            subject=asked,
            remedy="choose another name",
        )
    return figures, asked


def draw(figures: Path, picture: Path) -> str | None:
    """Draw a picture of a profile; return the reason if that failed, else None.

    Another process does it, so that matplotlib's memory is not part of this process's promised
    peak.
    """
    import subprocess
    import tempfile

    from shardmix.system.held_folder import open_folder

    command = [sys.executable, "-m", "shardmix.profiling.plot"]
    try:
        with (
            tempfile.TemporaryDirectory() as place,
            open_folder(picture.parent.resolve()) as folder,
        ):
            drawn = Path(place) / f"drawn{picture.suffix}"
            subprocess.run(
                [*command, str(figures.resolve()), str(drawn)],
                # shardmix's own parent folder, since python also imports from the current
                # folder.
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
                check=True,
                timeout=_MOST_SECONDS,
            )
            folder.replace(picture.name, drawn.read_bytes())
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        reason = lines[-1] if lines else one_line(error)
    except (OSError, subprocess.SubprocessError) as error:
        reason = one_line(error)
    else:
        return None
    return f"{picture}: could not be drawn ({reason}); its figures are in {figures}"
