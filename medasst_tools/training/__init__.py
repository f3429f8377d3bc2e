"""Training through llamafactory-cli: launches, checkpoints, runs that go on after a kill, and the demo's tiny model."""
