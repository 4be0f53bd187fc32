"""Fine-tuning upgraded segmentation networks, and knowing whether it helped."""
