"""One sentence for errors that other libraries raise about a user's files, settings or machine."""

from __future__ import annotations

import errno
import re

#: conditions of the machine, never of the code
MACHINE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
#: a class that the parser could not build, and the line of its error that says what to install
NOT_INSTALLED = re.compile(r"Problem with given class_path '([\w.]+)':\s+([^\n]*\bpip install\b[^\n]*)")
MISMATCH = re.compile(
    r"size mismatch for ([\w.]+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)


def foreign_sentence(error: BaseException) -> str | None:
    """What ``error`` means for the user and how to mend it; ``None`` if it is of no known kind."""
    text = str(error)
    if "Error(s) in loading state_dict" in text:
        return _wrong_weights(text)
    if "Caught " in text and " in DataLoader worker process" in text:
        return _from_worker(error, text)
    if "loaded state dict" in text and "parameter group" in text:
        return (
            "The checkpoint's optimiser state belongs to another model or other optimiser groups: resume "
            "with the config.yaml of the run, or start anew from its weights with model.init_weights."
        )
    if match := NOT_INSTALLED.search(text):
        return f"{match[1].rpartition('.')[2]} cannot be used: {match[2]}"
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate memory" in text:
        return (
            "The device's memory is full: lower data.batch_size (or data.eval_batch_size in evaluation), "
            "take smaller images, or set trainer.precision to bf16-mixed."
        )
    if isinstance(error, OSError) and error.errno in MACHINE:
        return (
            f"{error.filename or 'a file'}: {error.strerror}. The run folder is set by "
            "--trainer.default_root_dir; name one that can be written."
        )
    return None


def _wrong_weights(text: str) -> str:
    """From torch's list of every wrong name: the kinds of trouble, and the first few names of each."""
    parts = [f"{name} is ({have}) there and ({want}) here" for name, have, want in _shapes(text)]
    for word, meaning in (("Missing", "lacks"), ("Unexpected", "has the unknown")):
        if match := re.search(rf"{word} key\(s\) in state_dict: (.*?)\.\s*(?:\n|$)", text):
            names = [name.strip().strip("\"'") for name in match[1].split(",")]
            parts.append(f"it {meaning} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    return (
        f"The checkpoint does not fit the model: {'; '.join(parts)}. Use the config.yaml of the run that "
        "wrote it, or start anew from its weights with model.init_weights."
    )


def _shapes(text: str, limit: int = 3) -> list[tuple[str, str, str]]:
    """The first wrong shapes; weights of the net itself before buffers of filters and memories."""
    found = [(name, have.strip("[]"), want.strip("[]")) for name, have, want in MISMATCH.findall(text)]
    later = ("filters.", "memory.", "feature_bank.", "noise_ledger.")
    return sorted(found, key=lambda item: item[0].startswith(later))[:limit]


def _from_worker(error: BaseException, text: str) -> str | None:
    """The message of an error of ours that a loader process sent home with its traceback as text."""
    if type(error).__name__ != "BadImageError":
        return None
    last = text.strip().splitlines()[-1]
    return last.partition(f"{type(error).__name__}: ")[2] or last
