"""The streaming machine: what brings data and cells to the device, and the step that runs there."""
