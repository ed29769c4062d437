"""The Megatron backend: megatron-core's model, schedules and distributed optimizer behind the same face as the torch backend."""
