"""The interface of lmms-eval 0.7.3 that the adapter uses, where lmms-eval itself is not installed."""

from __future__ import annotations

import abc
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class CacheHook:
    def __init__(self, cachinglm: Any = None) -> None: ...

    def add_partial(self, attr: str, req: Any, res: Any) -> None: ...


class lmms(abc.ABC):
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook(None)
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[Any]) -> list[str]: ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests: list[Any]) -> list[str]: ...

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


@dataclass
class Instance:
    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    metadata: dict[str, Any] = field(default_factory=dict)
    task_name: str | None = None

    def __post_init__(self) -> None:
        self.task_name = self.metadata["task"]

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None


def register_model(*names: str) -> Any:
    return lambda cls: cls


def provide_lmms_eval() -> None:
    """Make ``lmms_eval`` importable: the real one where it is installed, otherwise this."""
    if "lmms_eval" in sys.modules or find_spec("lmms_eval") is not None:
        return
    contents: dict[str, dict[str, Any]] = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.registry": {"register_model": register_model},
        "lmms_eval.api.instance": {"Instance": Instance},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, content in contents.items():
        module = sys.modules[name] = ModuleType(name)
        vars(module).update(content)
