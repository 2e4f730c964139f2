//! Data: records, the template that makes texts of them, tokenising and packing, the activation cache.
