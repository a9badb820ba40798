"""What `train.finetune` makes of the data that it is given."""
