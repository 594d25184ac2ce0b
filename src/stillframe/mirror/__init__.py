"""The mirror: plain image files kept equal to a guest's disks at their last capture."""
