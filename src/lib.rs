//! resa-engine
