"""Talking to the API server: which one, as whom, and what counts as an answer."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from launcher import errors
from launcher.errors import Problem, Unreachable, UserError

TIMEOUT = (10, 60)  # seconds to connect, and to wait for an answer
PATIENCE = 30.0  # seconds, all together, that one question waits as the server asks with Retry-After
PAGE = 500  # objects in one answer, as kubectl asks for them
T = TypeVar("T")


def client() -> Any:
    """The library, with the credentials that files and plugins have now."""
    import kubernetes
    import yaml

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries are no news
    try:
        if _in_cluster():
            kubernetes.config.load_incluster_config()
        else:
            kubernetes.config.load_kube_config()
    except (kubernetes.config.ConfigException, yaml.YAMLError) as error:
        message = f"no Kubernetes cluster is configured: {' '.join(str(error).split())}"
        raise UserError(Problem(message, "kubectl config current-context")) from None
    configuration = kubernetes.client.Configuration.get_default_copy()
    configuration.retries = 0  # urllib3's own wait as long as a Retry-After says, an hour if it says so
    kubernetes.client.Configuration.set_default(configuration)
    return kubernetes


def _in_cluster() -> bool:
    """In a pod without a kubeconfig. The client's own load_config prints to stdout when it finds none."""
    kubeconfig = os.environ.get("KUBECONFIG") or Path("~/.kube/config").expanduser().is_file()
    return not kubeconfig and "KUBERNETES_SERVICE_HOST" in os.environ


def namespace() -> str:
    """As kubectl takes it: the context's, in a pod the pod's own, else `default`."""
    import kubernetes

    if _in_cluster():
        with contextlib.suppress(OSError):
            return Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()
        return "default"
    _, active = kubernetes.config.list_kube_config_contexts()
    return str(active["context"].get("namespace") or "default")


def facts(questions: Mapping[str, str], space: str | None) -> tuple[str, dict[str, Any]]:
    """The namespace, and the JSON of each path that the API server answers; what it does not is left out.

    Raises UserError without a cluster, Unreachable where it does not answer.
    """
    kubernetes = client()
    space = space or namespace()
    raw = kubernetes.client.ApiClient()
    said = {}
    for name, path in questions.items():
        try:
            with Answers():
                answer = raw.call_api(
                    path.format(space), "GET", auth_settings=["BearerToken"], response_type="object",
                    _return_http_data_only=True, _request_timeout=30,
                )  # fmt: skip
        except Unreachable:
            raise
        except UserError:
            continue
        said[name] = answer
    return space, said


class Answers:
    """API errors as ours: refused with the server's words, or not reached."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None or isinstance(error, UserError):
            return
        status = getattr(error, "status", None)
        if away(error):
            number = f" ({status})" if status else ""
            raise Unreachable(Problem(f"the API server did not answer{number}: {words(error)}")) from None
        if isinstance(status, int):
            raise UserError(refusal(error)) from None


def away(error: BaseException) -> bool:
    """Nobody answered, or somebody who cannot know: a broken connection, 401, 408, 429, 5xx."""
    status = getattr(error, "status", None)
    library = type(error).__module__.split(".")[0]
    if library in ("urllib3", "http") or (hasattr(error, "status") and status in (None, 0)):
        return True
    return (
        isinstance(error, ConnectionError) or status in (401, 408, 429) or (isinstance(status, int) and status >= 500)
    )


# Which line of the job file a field of the objects comes from.
LINES = (
    ("PodSecurity", ("kubernetes", "security", "run_as_user")),
    ("schedulingPolicy", ("kubernetes", "gang")),
    ("schedulerName", ("kubernetes", "gang")),
    ("elasticPolicy", ("kubernetes", "elastic")),
    ("runPolicy", ("kubernetes", "run_policy")),
    ("failurePolicy", ("kubernetes", "run_policy", "max_restarts")),
    ("ttlSecondsAfterFinished", ("kubernetes", "run_policy", "ttl")),
    ("managedBy", ("kubernetes", "run_policy", "managed_by")),
    ("runtimeRef", ("kubernetes", "runtime")),
    ("raining runtime", ("kubernetes", "runtime")),  # ClusterTrainingRuntime, "training runtime ... not found"
    ("rainingRuntime", ("kubernetes", "runtime")),
    ("topologySpreadConstraints", ("kubernetes", "spread")),
    ("affinity", ("kubernetes", "node_affinity")),
    ("hostNetwork", ("kubernetes", "network", "host_network")),
    ("runtimeClassName", ("kubernetes", "runtime_class")),
    ("serviceAccountName", ("kubernetes", "service_account")),
    ("initContainers", ("kubernetes", "sidecars")),
    ("securityContext", ("kubernetes", "security")),
    ("metadata.annotations", ("kubernetes", "annotations")),
    ("metadata.labels", ("kubernetes", "labels")),
    ("nodeSelector", ("kubernetes", "node_selector")),
    ("tolerations", ("kubernetes", "tolerations")),
    ("volumes", ("kubernetes", "volumes")),
    ("volumeMounts", ("kubernetes", "volumes")),
    ("priorityClassName", ("kubernetes", "priority_class")),
    ("imagePullSecrets", ("kubernetes", "image_pull_secrets")),
    ("image", ("container",)),
    ("nvidia.com", ("resources", "gpus_per_node")),
    ("cpu", ("resources", "cpus_per_node")),
    ("memory", ("resources", "memory")),
    ("metadata.name", ("name",)),
    ("namespaces", ("kubernetes", "namespace")),
    ("podTemplateOverrides", ("kubernetes", "trainer")),
    ("runtimePatches", ("kubernetes", "trainer")),
)  # fmt: skip


def place(said: str) -> errors.Path:
    """The line of the job file for what is said about a field of an object."""
    return next((where for part, where in LINES if part in said), ("kubernetes",))


def refusal(error: Any) -> Problem:
    """The server's own words, and the line of the job file where they name a field of it."""
    said = words(error)
    hint = ""
    if error.status == 404:
        hint = "is there that namespace, and in kubectl get crd the kind?"
    if error.status == 403 and "exceeded quota" in said:
        hint = "kubectl describe resourcequota: what is used, and by whom"
    at = place(said) if error.status != 409 else ("name",)
    return Problem(f"Kubernetes refuses ({error.status}): {said}", hint, at)


def words(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError, AttributeError):
        return str(getattr(error, "reason", None) or error)


def retry_after(error: Any) -> float | None:
    """Seconds that the server wants to be left alone; None when it does not say."""
    if getattr(error, "status", None) not in (429, 503):
        return None
    try:
        return max(0.0, float((error.headers or {}).get("Retry-After", "")))
    except (TypeError, ValueError):
        return None


def ask(question: Callable[[Any], T], *, sleep: Callable[[float], object] | None = None) -> T:
    """The answer. After a 401 credentials are read again and the question is asked once more; a Retry-After is kept.

    Whatever `question` does has to bear being done twice. Raises UserError, and Unreachable when nobody knows.
    """
    renewed, waited = False, 0.0
    while True:
        library = client()
        try:
            return question(library)
        except UserError:
            raise
        except Exception as error:
            if getattr(error, "status", None) == 401 and not renewed:
                renewed = True
                continue
            if (
                getattr(error, "status", None) == 410
            ):  # a version that the server has forgotten: who asked for it knows
                raise
            pause = retry_after(error)
            if pause is not None and waited + pause <= PATIENCE:
                pause += random.uniform(0, 0.25)  # noqa: S311 - so that many clients do not come back together
                waited += pause
                (sleep or time.sleep)(pause)
                continue
            with Answers():
                raise


def listed(call: Callable[..., Any], *place: str, **options: Any) -> tuple[list[dict[str, Any]], str, str]:
    """All objects as the JSON that they are, the version they were read at, and the server's own time."""
    items: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    while True:
        response = call(*place, limit=PAGE, _preload_content=False, _request_timeout=TIMEOUT, **options, **more)
        found = json.loads(response.data)
        items += found.get("items") or []
        metadata = found.get("metadata") or {}
        if not metadata.get("continue"):
            return items, str(metadata.get("resourceVersion", "")), str(response.headers.get("Date", ""))
        more = {"_continue": metadata["continue"]}


def lines(stream: Any) -> Iterator[bytes]:
    """Of a response that goes on; of a line longer than 1 MiB its pieces."""
    rest = b""
    for chunk in stream.stream():
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
        if len(rest) > 1 << 20:
            yield rest
            rest = b""
    if rest:
        yield rest
