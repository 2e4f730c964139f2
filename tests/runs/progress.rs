use std::io::Write;
use std::sync::{Arc, Mutex};

use resa_engine::report::progress::Lines;
use resa_engine::train::{Event, Observer, StepMetrics, StepStage};

#[derive(Clone, Default)]
struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What is shown of a stage of `steps` steps, a line every `log_every`.
fn shown(steps: u64, done: u64, log_every: usize) -> Vec<String> {
    let out = Shared::default();
    let mut lines = Lines::new(Box::new(out.clone()), log_every);
    let name = "Stage I".to_owned();
    lines.on_event(&Event::Phase { name, steps, done });
    for step in done + 1..=steps {
        let metrics = StepMetrics {
            fvu: Some(0.25),
            dead_fraction: Some(0.5),
            tokens_per_s: 1234.4,
            ..StepMetrics::new(StepStage::Sae, step)
        };
        lines.on_event(&Event::Step(metrics));
    }
    let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_line_is_shown_every_few_steps_and_for_the_last() {
    let lines = shown(5, 0, 2);
    assert_eq!(lines.len(), 4);
    assert_eq!(lines[0], "Stage I: 5 steps");
    for (line, step) in lines[1..].iter().zip([2, 4, 5]) {
        assert!(line.starts_with(&format!("Stage I {step}/5 ")), "{line}");
    }
}

#[test]
fn a_line_has_measurements_rate_and_time_left() {
    let lines = shown(1, 0, 1);
    for part in [
        "fvu 0.2500",
        "dead 50.0 %",
        "1234 tokens/s",
        "left 00:00:00",
    ] {
        assert!(lines[1].contains(part), "{}", lines[1]);
    }
}

#[test]
fn a_resumed_stage_says_what_was_done_before() {
    let lines = shown(9, 7, 1);
    assert_eq!(lines[0], "Stage I: 9 steps, 7 of them done before");
    assert_eq!(lines.len(), 3);
}
