"""fmsuite: pretrain, adapt and judge vision foundation models for fields whose images are not photographs."""

__version__ = "0.1.0"
