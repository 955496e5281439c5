"""Weights of timm's networks by their name, from the Hugging Face hub: fetched once, then kept.

They go into the hub's own cache, by its own library: it resumes, shows progress, and reads
HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and proxies.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.nets.torchvision_import import timm
from pipeline.stage_runtime.errors import ParamError, WeightsError, one_line, suggest

FILES = ("model.safetensors", "pytorch_model.bin")  # as timm publishes them, the better one first


class Fetched(NamedTuple):
    """A file of weights, and where on the hub it is from."""

    file: Path
    repository: str
    commit: str


def architecture(name: str) -> str:
    """Return the name of the network in a name of weights: resnet18 of resnet18.a1_in1k."""
    return name.partition(".")[0]


def configuration(name: str) -> Any:
    """Return what timm knows of weights: where they are, their preprocessing, their licence.

    Those of the first tag, if the name has none; None if there are none. Raises ParamError for an
    unknown tag.
    """
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        network = architecture(name)
        tagged = [f"timm/{known}" for known in timm.list_pretrained(f"{network}.*")]
        raise ParamError(
            f"backbone.name = 'timm/{name}': no such weights; {suggest(f'timm/{name}', tagged)}"
        ) from None


def fetched(name: str, tell: Callable[[str], object]) -> Fetched:
    """Return the file of a network's weights, which is fetched if it is not in the cache.

    `tell` is called with a line before the hub is asked.

    Raises WeightsError if it can't be had, with what to do.
    """
    from huggingface_hub import try_to_load_from_cache

    found = configuration(name)
    if found is None or not found.hf_hub_id:
        raise WeightsError(
            f"backbone.weights: timm publishes none for timm/{name}; name a weight file, or none"
        )
    repository = found.hf_hub_id
    names = [found.hf_hub_filename] if found.hf_hub_filename else FILES
    # The cache first, so that a later run asks nobody.
    kept = (try_to_load_from_cache(repository, file) for file in names)
    path = next((Path(file) for file in kept if isinstance(file, str)), None)
    if path is None:
        tell(f"weights: asking {_address(repository)}")
        path = next(file for name in names if (file := _file(repository, name, names[-1])))
    return Fetched(path, repository, path.parent.name)


def _address(repository: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}"


def _file(repository: str, name: str, last: str) -> Path | None:
    """Fetch a file of a repository; None if it isn't there, and is not the last to be tried."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    hub.utils.logging.set_verbosity(logging.ERROR)  # each retry would be a line
    at = _address(repository)
    try:
        return Path(hub.hf_hub_download(repository, name))
    except errors.GatedRepoError:
        raise WeightsError(
            f"{at}: its licence has to be accepted there first; then set HF_TOKEN to your token"
        ) from None
    except errors.RepositoryNotFoundError:
        raise WeightsError(
            f"{at}: no such repository, or a private one; set HF_TOKEN, or name a weight file"
        ) from None
    except errors.RemoteEntryNotFoundError as error:
        if name != last:
            return None
        failed: Exception = error
    except (errors.HFValidationError, OSError) as error:  # the hub isn't reached, among others
        failed = error
    why = one_line(failed.__cause__ or failed, 120)
    raise WeightsError(
        f"{at}: {name} can't be fetched ({why}); try again, or get the file elsewhere and set "
        "backbone.weights to it"
    )


def licence(name: str) -> str:
    """Return the licence of a network's weights as timm states it; empty if it states none."""
    found = configuration(name)
    return (found.license or "") if found is not None else ""
