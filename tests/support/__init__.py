"""What all tests share: tiny random models, the published procedure written a second time, devices without data."""
