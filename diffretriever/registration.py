"""Makes transformers know DiffRetriever: `AutoModel` loads releases with the installed code, none of their own."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

AUTO_CONFIG = "transformers.models.auto.configuration_auto"  # the module of AutoConfig
MODEL_TYPE = "diffretriever"


def register_with_transformers() -> None:
    """Announce our model type to AutoConfig: now, or when transformers is imported.

    To import transformers takes seconds, which `import diffretriever` and `diffretriever --help` do not wait for.
    """
    if AUTO_CONFIG in sys.modules:
        _announce(sys.modules[AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds AutoConfig's module as Python does, and has the model type announced when it has run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """See `MetaPathFinder`."""
        if fullname != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_announce(module: Any) -> None:
                execute(module)
                _announce(module)

            loader.exec_module = execute_and_announce
        return spec


def _announce(auto: Any) -> None:
    """Register a config that becomes ours when the first config.json of our type is read.

    Args:
        auto: the module of AutoConfig; while it is imported, most of transformers cannot be.
    """
    from transformers.configuration_utils import PretrainedConfig

    class AnnouncedConfig(PretrainedConfig):
        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return _register().from_dict(config_dict, **kwargs)

    auto.AutoConfig.register(MODEL_TYPE, AnnouncedConfig, exist_ok=True)


def _register() -> Any:
    """Register our config and model, and return the config's class."""
    from transformers import AutoConfig, AutoModel

    from .model.modeling_diffretriever import DiffRetriever, DiffRetrieverConfig

    AutoConfig.register(MODEL_TYPE, DiffRetrieverConfig, exist_ok=True)
    AutoModel.register(DiffRetrieverConfig, DiffRetriever, exist_ok=True)
    return DiffRetrieverConfig
