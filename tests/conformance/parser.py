"""What DeepSpeed's own config parser makes of configs: JSON lines in, one JSON line out for each.

Run by the interpreter whose deepspeed is asked. A key that the parser never looks at is one that it ignores.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"
with contextlib.redirect_stdout(sys.stderr):
    from alone import alone
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel


class Watched(dict):
    """A dict that remembers which of its keys were read by name."""

    def __init__(self, values: dict) -> None:
        super().__init__({k: Watched(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.read: set[str] = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        return super().__contains__(key)

    def copy(self):
        return self

    def __deepcopy__(self, memo):
        return self

    def unread(self, path: tuple[str, ...] = ()) -> list[str]:
        found = [".".join((*path, key)) for key in self if key not in self.read]
        for key in self:
            child = super().__getitem__(key)
            # the engine hands params over as they are, and a test that trains sees what becomes of them
            if isinstance(child, Watched) and key in self.read and key != "params":
                found += [name for name in child.unread((*path, key)) if name.split(".")[-1] not in TYPED]
        return found


TYPED: set[str] = set()  # keys that a section with typed fields took


def watch_typed_sections() -> None:
    """They get their section as keyword arguments, past any dict that could watch."""
    plain = DeepSpeedConfigModel.__init__

    def watched(self, strict=False, **data):
        fields = type(self).model_fields
        TYPED.update(set(data) & ({*fields, *(field.alias for field in fields.values())}))
        plain(self, strict=strict, **data)

    DeepSpeedConfigModel.__init__ = watched


class World:
    """What the parser asks of a model-parallel unit: how many ranks see other samples."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def get_data_parallel_world_size(self) -> int:
        return self.ranks


def main() -> None:
    with alone():
        watch_typed_sections()
        for line in sys.stdin:
            TYPED.clear()
            asked = json.loads(line)
            watched = Watched(asked["config"])
            try:
                parsed = DeepSpeedConfig(watched, mpu=World(asked["replicas"]))
                answer = {
                    "error": "",
                    "unread": watched.unread(),
                    "batch": [
                        parsed.train_batch_size,
                        parsed.train_micro_batch_size_per_gpu,
                        parsed.gradient_accumulation_steps,
                    ],
                    "stage": int(parsed.zero_optimization_stage),
                    "clipping": parsed.gradient_clipping,
                    "optimizer": parsed.optimizer_name,
                    "scheduler": parsed.scheduler_name,
                    "dtype": [bool(parsed.float16_config.enabled), bool(parsed.bfloat16_config.enabled)],
                }
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
