"""A two-stage fine-tuning pipeline for image classifiers."""
