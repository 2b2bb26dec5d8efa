"""dslaunch: one YAML file to a running multi-node DeepSpeed job."""

__version__ = "0.1.0"
