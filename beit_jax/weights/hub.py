"""Weights on the Hugging Face hub, named `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`.

    resolve("hf:microsoft/beit-base-patch16-224-pt22k")  # a folder in the hub's local cache
    resolve("runs/base")                                 # "runs/base": any other path is unchanged
    push({"model.safetensors": "exported/model.safetensors"}, repository="me/beit")

Everything goes through `huggingface_hub` (the extra `[hub]`), so its cache (HF_HOME), its offline
switch (HF_HUB_OFFLINE), its mirror (HF_ENDPOINT) and its token (HF_TOKEN) work as its users know
them. On several hosts every process downloads to its own host's cache; processes that share a
cache wait for each other's file locks.
"""

import dataclasses
import glob
import os
import re
from collections.abc import Mapping
from types import ModuleType

from etils import epath

from beit_jax.weights import folders, shards
from beit_jax.weights.report import WeightsError

PREFIX = "hf:"
# timm's own spelling, too.
PREFIXES = (PREFIX, "hf-hub:")
_SETTINGS = ("config.json", "preprocessor_config.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repository:
    """What `hf:OWNER/NAME@REVISION` names.

    Attributes:
      name: "OWNER/NAME".
      revision: a branch, a tag or a commit; None means the default branch.
    """

    name: str
    revision: str | None = None


def parse(source: str) -> Repository:
    """Reads "hf:OWNER/NAME" or "hf:OWNER/NAME@REVISION".

    Raises:
      WeightsError: the text has another form.
    """
    match = re.fullmatch(r"hf:(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?", source)
    if match is None:
        raise WeightsError(f"{source}: a repository is written hf:OWNER/NAME or hf:OWNER/NAME@REV")
    return Repository(name=match[1], revision=match[2])


def resolve(source: str) -> str:
    """Downloads the weights that `source` names on the hub and gives their local path.

    Args:
      source: "hf:OWNER/NAME", "hf:OWNER/NAME@REVISION", or any other path.

    Returns:
      For "hf:…" the folder in the hub's cache, or the file in it where the repository holds weights
      without a config.json; any other path unchanged. What is in the cache and has not changed is
      not downloaded again.

    Raises:
      WeightsError: `huggingface_hub` is not installed, the repository or revision does not exist,
        nothing is cached while offline, or no network is reachable. The message is one line.
    """
    if not source.startswith(PREFIXES) or source.startswith(f"{PREFIX}//"):
        return source
    source = PREFIX + source.partition(":")[2]
    repository = parse(source)
    hub = _hub(source)
    try:
        names = _names(hub, repository)
        choice = folders.choose([name for name in names if "/" not in name], source=source)
        folder = _download(hub, repository, [*_SETTINGS, choice.file])
        if folders.is_index(choice.file):
            shards_named = shards.weight_map(epath.Path(folder) / choice.file).values()
            _download(hub, repository, sorted(set(shards_named)))
    except WeightsError:
        raise
    except Exception as error:  # the HTTP library's own errors differ between its versions
        raise WeightsError(f"{source}: {_reason(error, hub, repository)}") from None
    has_config = os.path.exists(os.path.join(folder, "config.json"))
    return folder if has_config else os.path.join(folder, choice.file)


def check(repository: str) -> None:
    """Raises WeightsError where a push cannot work: a malformed name, no `huggingface_hub`."""
    _hub(f"{PREFIX}{parse(PREFIX + repository.removeprefix(PREFIX)).name}")


def push(
    files: Mapping[str, str | bytes], *, repository: str, private: bool = False, message: str
) -> str:
    """Uploads files in one commit, and creates the repository where it does not exist.

    Progress is shown on stderr.

    Args:
      files: path in the repository → local path or content.
      repository: "OWNER/NAME".
      private: whether a repository that is created is private; one that exists stays as it is.
      message: the commit's.

    Returns:
      The commit's address.

    Raises:
      WeightsError: `huggingface_hub` is not installed, or the hub refuses. The message is one line.
    """
    target = parse(PREFIX + repository.removeprefix(PREFIX))
    hub = _hub(f"{PREFIX}{target.name}")
    api = hub.HfApi()
    try:
        api.create_repo(target.name, private=private, exist_ok=True)
        commit = api.create_commit(
            target.name,
            operations=[
                hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=path)
                for name, path in files.items()
            ],
            commit_message=message,
            revision=target.revision,
        )
    except Exception as error:  # the HTTP library's own errors differ between its versions
        raise WeightsError(
            f"{PREFIX}{target.name}: not pushed: {_reason(error, hub, target)}"
        ) from None
    return str(commit.commit_url)


def _names(hub: ModuleType, repository: Repository) -> list[str]:
    """The files of a repository, or those of it in the cache where the hub can't be asked."""
    errors = hub.errors
    try:
        # Not `list_repo_files`, which tries for half a minute where the hub can't be reached.
        found = hub.HfApi().model_info(repository.name, revision=repository.revision)
        return [file.rfilename for file in found.siblings or ()]
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except Exception as error:  # offline, or unreachable: the HTTP library's own errors differ
        try:
            # Without patterns, files that were never asked for would make the cache incomplete.
            folder = hub.snapshot_download(
                repository.name,
                revision=repository.revision,
                allow_patterns=[],
                local_files_only=True,
            )
        except errors.LocalEntryNotFoundError:
            if isinstance(error, errors.HfHubHTTPError):
                raise error from None  # the hub's own words
            raise
        return os.listdir(folder)


def _download(hub: ModuleType, repository: Repository, names: list[str]) -> str:
    """Downloads files by their exact names; gives the folder in the cache."""
    return str(
        hub.snapshot_download(
            repository.name,
            revision=repository.revision,
            allow_patterns=[glob.escape(name) for name in names],
        )
    )


def _hub(source: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise WeightsError(
            f"{source}: the hub needs huggingface_hub, which is not installed:"
            " pip install beit-jax[hub]"
        ) from None
    return huggingface_hub


def _reason(error: Exception, hub: ModuleType, repository: Repository) -> str:
    """One line that says what failed, in the caller's terms where the cause is known."""
    errors = hub.errors
    if isinstance(error, errors.GatedRepoError):
        return f"{repository.name} is gated; accept its terms on the hub and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no repository {repository.name}, or it is private and HF_TOKEN gives no access"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository.name} has no revision {repository.revision}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if hub.constants.HF_HUB_OFFLINE:
            return "not in the cache, and HF_HUB_OFFLINE forbids downloading it"
        return f"not in the cache, and {hub.constants.ENDPOINT} can't be reached"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
