//! Progress of a run on standard error: bars on a terminal, lines anywhere else.

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

use indicatif::{FormattedDuration, ProgressBar, ProgressStyle};

use crate::train::{Event, Observer, StepMetrics};

/// Shows a run as it goes.
pub enum Progress {
    /// A bar with rate and time left.
    Bar(ProgressBar),
    /// A line every few steps.
    Lines(Lines),
}

impl Progress {
    /// On standard error; a line every `log_every` steps where that is no terminal.
    pub fn stderr(log_every: usize) -> Self {
        match stderr().is_terminal() {
            true => Self::Bar(ProgressBar::hidden()),
            false => Self::Lines(Lines::new(Box::new(stderr()), log_every)),
        }
    }
}

impl Observer for Progress {
    fn on_event(&mut self, event: &Event) {
        match self {
            Self::Lines(lines) => lines.on_event(event),
            Self::Bar(bar) => match event {
                Event::Phase { name, steps, done } => {
                    bar.finish();
                    *bar = new_bar(name, *steps, *done);
                }
                Event::Progress { done } => bar.set_position(*done),
                Event::Step(metrics) => {
                    bar.set_message(summary(metrics));
                    bar.set_position(metrics.step);
                }
                Event::Note(_) | Event::Warning(_) | Event::Saved(_) => {
                    bar.suspend(|| say(&mut stderr(), &message(event)));
                }
            },
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Self::Bar(bar) = self {
            // What was reached stays on the screen when the run ends early.
            bar.abandon();
        }
    }
}

fn new_bar(name: &str, steps: u64, done: u64) -> ProgressBar {
    const TEMPLATE: &str = "{prefix} {bar:20} {pos}/{len} {msg} {elapsed} (left {eta})";
    let style = ProgressStyle::with_template(TEMPLATE);
    let bar = ProgressBar::new(steps)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_prefix(name.to_owned())
        .with_position(done);
    bar.reset_eta();
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// Progress as plain lines.
pub struct Lines {
    out: Box<dyn Write + Send>,
    log_every: u64,
    phase: String,
    steps: u64,
    done: u64,
    started: Instant,
}

impl Lines {
    /// Lines on `out`, one every `log_every` steps and one for the last step of a phase.
    pub fn new(out: Box<dyn Write + Send>, log_every: usize) -> Self {
        Self {
            out,
            log_every: log_every.max(1) as u64,
            phase: String::new(),
            steps: 0,
            done: 0,
            started: Instant::now(),
        }
    }

    fn line(&mut self, text: &str) {
        say(&mut self.out, text);
    }

    fn begin(&mut self, name: &str, steps: u64, done: u64) {
        self.phase = name.to_owned();
        self.steps = steps;
        self.done = done;
        self.started = Instant::now();
        let from = match done {
            0 => String::new(),
            done => format!(", {done} of them done before"),
        };
        self.line(&format!("{name}: {steps} steps{from}"));
    }

    fn step(&mut self, metrics: &StepMetrics) {
        let step = metrics.step;
        if !step.is_multiple_of(self.log_every) && step != self.steps {
            return;
        }
        let taken = step.saturating_sub(self.done).max(1);
        let each = self.started.elapsed().as_secs_f64() / taken as f64;
        let left = each * self.steps.saturating_sub(step) as f64;
        let left = Duration::try_from_secs_f64(left).unwrap_or_default();
        let text = format!(
            "{} {step}/{} {} left {}",
            self.phase,
            self.steps,
            summary(metrics),
            FormattedDuration(left)
        );
        self.line(&text);
    }
}

impl Observer for Lines {
    fn on_event(&mut self, event: &Event) {
        match event {
            Event::Phase { name, steps, done } => self.begin(name, *steps, *done),
            Event::Progress { .. } => {}
            Event::Step(metrics) => self.step(metrics),
            Event::Note(_) | Event::Warning(_) | Event::Saved(_) => self.line(&message(event)),
        }
    }
}

/// Writes a line. A run goes on when nobody can read what it says.
fn say(out: &mut dyn Write, text: &str) {
    let _ = writeln!(out, "{text}");
}

/// What an event says in words; nothing where it is a number alone.
fn message(event: &Event) -> String {
    match event {
        Event::Note(text) => text.clone(),
        Event::Warning(text) => format!("warning: {text}"),
        Event::Saved(path) => format!("saved {}", path.display()),
        Event::Phase { .. } | Event::Progress { .. } | Event::Step(_) => String::new(),
    }
}

/// The measurements of a step on one line, the rate last.
fn summary(metrics: &StepMetrics) -> String {
    let mut words: Vec<String> = metrics.hookpoint.iter().cloned().collect();
    for (name, value) in metrics.scalars() {
        match name {
            "lr" => {}
            "tokens_per_s" => words.push(format!("{value:.0} tokens/s")),
            "dead_fraction" => words.push(format!("dead {:.1} %", 100.0 * value)),
            _ => words.push(format!("{name} {}", short(value))),
        }
    }
    words.join("  ")
}

/// Four digits after the point, or the exponent where they would not show the value.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if (1e-3..1e5).contains(&size) => format!("{value:.4}"),
        _ => format!("{value:.3e}"),
    }
}
