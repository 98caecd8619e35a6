"""Segmentation of whole images: cut into windows, put together again, compared with labels."""
