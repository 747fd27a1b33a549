"""`make golden`: writes the resolved config of every experiment to tests/golden.

A difference there is a change of an experiment, to be reviewed as such.
"""

import dataclasses
import json
from pathlib import Path

import experiments

DIRECTORY = Path(__file__).parent / "golden"


def text(name: str) -> str:
    (config,) = experiments.find(name)
    resolved = dataclasses.asdict(config)
    sharing = config.model.sharing
    maps = (
        {"k_map": sharing.k_map, "v_map": sharing.v_map}
        if sharing.is_split
        else {"kv_map": sharing.k_map}
    )
    for which, sources in maps.items():
        resolved["model"][f"resolved_{which}"] = ",".join(map(str, sources))
    return json.dumps(resolved, indent=2) + "\n"


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    for stale in DIRECTORY.glob("*.json"):
        stale.unlink()
    for name in experiments.rows():
        (DIRECTORY / f"{name}.json").write_text(text(name))


if __name__ == "__main__":
    main()
