//! How a caller watches a run and stops it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::metrics::StepMetrics;
use crate::error::{Error, Result};

/// What happens in a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A part of the run begins: tokenising, Stage I, …
    Phase {
        /// What to call it in front of a user.
        name: String,
        /// Steps that it has in all.
        steps: u64,
        /// Steps of it that a resumed run has behind it.
        done: u64,
    },
    /// A step of a phase without metrics was done.
    Progress {
        /// Steps of the phase done so far.
        done: u64,
    },
    /// A training step was done.
    Step(StepMetrics),
    /// Something worth knowing.
    Note(String),
    /// Something that may not be what the user wants.
    Warning(String),
    /// A file or folder was completed.
    Saved(PathBuf),
}

/// Receives the events of a run, on the thread that trains.
pub trait Observer {
    /// Called for each event in turn; training waits until it returns.
    fn on_event(&mut self, event: &Event);
}

/// An observer that looks away.
impl Observer for () {
    fn on_event(&mut self, _event: &Event) {}
}

/// Any function of an event observes.
impl<F: FnMut(&Event)> Observer for F {
    fn on_event(&mut self, event: &Event) {
        self(event);
    }
}

/// Asks a run to stop after its current step. Clones share the flag.
#[derive(Clone, Debug, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// A flag that is not set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the run to stop. Returns whether it had been asked before.
    pub fn cancel(&self) -> bool {
        self.0.swap(true, Ordering::Relaxed)
    }

    /// Whether the run was asked to stop.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// [`Error::Cancelled`] where the run was asked to stop.
    pub fn check(&self) -> Result<()> {
        match self.is_cancelled() {
            true => Err(Error::Cancelled),
            false => Ok(()),
        }
    }
}

/// How a run starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunOptions {
    /// Go on with the run in the folder instead of starting one.
    pub resume: bool,
}
