"""`muster presets`: the configs that muster brings."""

import json

from configs.load import presets as described

from .runs import Json


def presets(as_json: Json = False) -> None:
    """List the presets: what each trains on what, how long, and its measured result. Example: muster presets"""
    if as_json:
        print(json.dumps([preset._asdict() for preset in described()], indent=1))
        return
    for preset in described():
        took = f", {preset.minutes:g} minutes on two CPU cores" if preset.minutes else ""
        print(f"{preset.name}: {preset.family}, {preset.task}{took}")
        print(f"  {preset.trains}\n  data: {preset.data}\n  held out: {preset.held_out}")
