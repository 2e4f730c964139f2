//! What a run shows: progress bars and TensorBoard events.
