//! What a run shows while it goes: progress on standard error, events for TensorBoard.

use resa_engine::report::{Progress, TensorBoard};
use resa_engine::train::{Event, Observer, TrainConfig};

pub struct Show {
    progress: Progress,
    /// `None` once writing has failed, which is said once and does not end the run.
    events: Option<TensorBoard>,
}

impl Show {
    pub fn new(config: &TrainConfig) -> Self {
        Self {
            progress: Progress::stderr(config.log_every),
            events: Some(TensorBoard::new(&config.out)),
        }
    }
}

impl Observer for Show {
    fn on_event(&mut self, event: &Event) {
        self.progress.on_event(event);
        let written = self.events.as_mut().map(|events| events.record(event));
        if let Some(Err(error)) = written {
            self.events = None;
            let text = format!("no more TensorBoard events are written: {error}");
            self.progress.on_event(&Event::Warning(text));
        }
    }
}
