//! A whole run from another program, watched, stopped and resumed:
//! `cargo run --release --example embed -- MODEL DATA OUT`, with a model folder in Hugging Face's
//! form, a file of problems and answers, and a folder that does not exist yet.

use resa_engine::train::{self, CancelFlag, Event, RunOptions, TrainConfig};
use resa_engine::{Error, Result};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, data, out] = &args[..] else {
        return Err(Error::setting("arguments", "expected MODEL DATA OUT"));
    };
    // Small enough for a model of a few layers; what is not named has the program's default.
    let config = TrainConfig {
        target: Some(model.clone()),
        data: Some(data.clone()),
        out: out.into(),
        hookpoints: vec![2],
        latents: Some(512),
        k: 16,
        seq_len: 64,
        sae_batch: 2,
        lr: 1e-3,
        max_sae_steps: Some(20),
        max_sft_steps: Some(20),
        ..TrainConfig::default()
    };

    // A clone of the flag can be set from anywhere: another thread, a signal, or the observer.
    let cancel = CancelFlag::new();
    let stop = cancel.clone();
    let mut observer = |event: &Event| {
        if let Event::Step(m) = event {
            let loss = m.fvu.or(m.kl_per_token).unwrap_or(f64::NAN);
            println!("{} step {}: {loss:.4}", m.stage.name(), m.step);
            if m.step == 5 {
                stop.cancel();
            }
        }
    };
    match train::run(&config, RunOptions::default(), &mut observer, &cancel) {
        Err(Error::Cancelled) => println!("stopped after 5 steps, with a checkpoint"),
        result => return result.map(|_| ()),
    }

    // The same bits as if it had never been stopped.
    let resume = RunOptions { resume: true };
    let summary = train::run(&config, resume, &mut observer, &CancelFlag::new())?;
    for (layer, start, end) in summary.fvu {
        println!("FVU at layer {layer}: {start:.4} -> {end:.4}");
    }
    if let Some((start, end)) = summary.loss {
        println!("KL divergence a token: {start:.4} -> {end:.4}");
    }
    println!("adapter and SAE are in {}", summary.out.display());
    Ok(())
}
