"""The embedded tasks and their small pretrained model, for machines without a hub."""
