//! `features` finds the latents that fire on the marks of reasoning, and says what SAEs cost.

use std::collections::BTreeSet;
use std::fs;

use resa_engine::Device;
use resa_engine::data::{Template, Tokenizer, records};
use resa_engine::eval::Inference;
use resa_engine::formats::{huggingface, sparsify};
use resa_engine::model::Layout;
use resa_engine::tensor::Tensor;
use serde_json::Value;

use super::support::{Workshop, fixture, stderr};

const LAYERS: [usize; 4] = [1, 2, 3, 4];

/// A workshop with SAEs at four layers in `run/sae`, and the command's arguments for them.
fn with_saes() -> (Workshop, Vec<String>) {
    let workshop = Workshop::new(60);
    let mut more = vec!["--stage", "sae", "--sae-epochs", "3"];
    more.extend([
        "--layer", "1", "--layer", "2", "--layer", "3", "--layer", "4",
    ]);
    workshop.train("run", &more);
    let path = |name: &str| fixture(name).to_str().unwrap().to_owned();
    let (model, template) = (path("example/target"), path("example/template.jinja"));
    let args = [
        "features",
        "--model",
        &model,
        "--sae",
        "run/sae",
        "--template",
        &template,
    ];
    let more = ["--data", "data.jsonl", "--limit", "20"];
    let args = args.iter().chain(&more).map(|&a| a.to_owned()).collect();
    (workshop, args)
}

/// What is measured of an SAE, found anew.
struct Recount {
    /// The latents that fire on marks alone, a token's text deciding whether it is one.
    reasoning: BTreeSet<u64>,
    fvu: f64,
    l0: f64,
    silent: f64,
}

/// The sum of squared distances of rows from others, or from their own mean.
fn squares(x: &[f32], d: usize, from: Option<&[f32]>) -> f64 {
    let rows = x.len() / d;
    let mean = |c: usize| {
        x.iter()
            .skip(c)
            .step_by(d)
            .map(|&v| f64::from(v))
            .sum::<f64>()
    };
    let means: Vec<f64> = (0..d).map(|c| mean(c) / rows as f64).collect();
    let origin = |i: usize| from.map_or(means[i % d], |from| from[i].into());
    let differences = x.iter().enumerate().map(|(i, &v)| f64::from(v) - origin(i));
    differences.map(|v| v * v).sum()
}

fn recount(workshop: &Workshop, layer: usize) -> Recount {
    let dir = fixture("example/target");
    let model = huggingface::load(&dir).unwrap();
    let sae = sparsify::load_at(&workshop.path("run/sae"), layer, &model.config).unwrap();
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    let template = Template::from_file(fixture("example/template.jinja")).unwrap();
    let device = Device::cpu(1).unwrap();
    let (mut on_mark, mut elsewhere) = (BTreeSet::new(), BTreeSet::new());
    let (mut error, mut variance, mut fired, mut tokens) = (0.0, 0.0, 0, 0);
    for record in records::read(workshop.path("data.jsonl"))
        .unwrap()
        .iter()
        .take(20)
    {
        let mut ids = vec![tokenizer.bos().unwrap_or(tokenizer.eos_id())];
        ids.extend(
            tokenizer
                .encode(&template.render(record).unwrap(), false)
                .unwrap(),
        );
        let layout = Layout::new(&model.config, 1, ids.len()).unwrap();
        let tensor = Tensor::from_u32(ids.clone(), [ids.len()]).unwrap();
        let x = Inference::new(&model)
            .layer_output(&device, tensor, layer, &layout)
            .unwrap();
        let (acts, indices) = sae.encode(&device, &x).unwrap();
        let x_hat = sae.reconstruct(&device, &x).unwrap();
        let (d, x) = (sae.config.d_in, x.f32s().unwrap());
        error += squares(x, d, Some(x_hat.f32s().unwrap()));
        variance += squares(x, d, None);
        fired += acts.f32s().unwrap().iter().filter(|&&a| a > 0.0).count();
        tokens += ids.len();
        let rows = acts
            .f32s()
            .unwrap()
            .chunks(8)
            .zip(indices.u32s().unwrap().chunks(8));
        for (id, (acts, indices)) in ids.iter().zip(rows) {
            // The example's tokenizer has each mark as one token.
            let token = tokenizer.decode(&[*id], false).unwrap();
            let is_mark = ["<think>", "</think>"].contains(&token.trim());
            let place = if is_mark {
                &mut on_mark
            } else {
                &mut elsewhere
            };
            let fired = acts.iter().zip(indices).filter(|&(&a, _)| a > 0.0);
            place.extend(fired.map(|(_, &latent)| u64::from(latent)));
        }
    }
    let active = on_mark.union(&elsewhere).count() as f64;
    Recount {
        reasoning: on_mark.difference(&elsewhere).copied().collect(),
        fvu: error / variance,
        l0: fired as f64 / tokens as f64,
        silent: 1.0 - active / sae.config.num_latents as f64,
    }
}

#[test]
fn reasoning_features_are_the_latents_that_fire_on_marks_alone() {
    let (workshop, mut args) = with_saes();
    args.extend(["--json", "--out", "study", "--compare"].map(str::to_owned));
    args.push(fixture("example/source").to_str().unwrap().to_owned());
    let printed: Value = serde_json::from_str(&workshop.prints(&args)).unwrap();
    let hookpoints = printed["hookpoints"].as_array().unwrap();
    assert_eq!(hookpoints.len(), LAYERS.len());
    let mut all = 0;
    for (hookpoint, layer) in hookpoints.iter().zip(LAYERS) {
        assert_eq!(hookpoint["layer"], layer);
        let features = hookpoint["features"].as_array().unwrap();
        let found: BTreeSet<u64> = features
            .iter()
            .map(|f| f["latent"].as_u64().unwrap())
            .collect();
        let want = recount(&workshop, layer);
        assert_eq!(found, want.reasoning, "layer {layer}");
        assert_eq!(hookpoint["reasoning_features"], found.len());
        all += found.len();
        for context in features
            .iter()
            .flat_map(|f| f["contexts"].as_array().unwrap())
        {
            assert!(
                context["token"].as_str().unwrap().contains("think>"),
                "{context}"
            );
        }
        let number = |name: &str| hookpoint[name].as_f64().unwrap();
        for (name, want) in [
            ("fvu", want.fvu),
            ("l0", want.l0),
            ("silent_fraction", want.silent),
        ] {
            let found = number(name);
            let near = (found - want).abs() <= 1e-5 * want.abs();
            assert!(near, "layer {layer}, {name}: {found}, recounted {want}");
        }
        assert!(number("loss_with_sae") < number("loss_with_zeros"));
        assert!(number("loss_recovered") < 1.05);
    }
    assert!(
        all > 0,
        "the example has no reasoning features: nothing was tested"
    );
    assert!(printed["compare"]["distance"].as_f64().is_some());
    // Where the models lie on this machine is nobody's business.
    assert_eq!(printed["model"], "target");
    assert_eq!(printed["compare"]["model"], "source");
    let written = fs::read_to_string(workshop.path("study/features.json")).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), printed);
    let picture = fs::read_to_string(workshop.path("study/features.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
    assert!(picture.contains(">\ntarget\n<") && !picture.contains("fixtures"));
}

#[test]
fn features_of_the_wrong_folders_are_refused_by_name() {
    let (workshop, args) = with_saes();
    let with = |more: &[&str]| {
        let mut args = args.clone();
        args.extend(more.iter().map(|&a| a.to_owned()));
        workshop.resa(&args)
    };
    let cases: [(&[&str], &str); 3] = [
        (&["--sae", "run/sae/model.layers.2"], "one SAE for layer 2"),
        (&["--sae", "run"], "model.layers.N"),
        (&["--sae", "nowhere"], "nowhere"),
    ];
    for (more, named) in cases {
        let output = with(more);
        assert_eq!(output.status.code(), Some(1), "{more:?}");
        assert!(
            stderr(&output).contains(named),
            "{more:?}: {}",
            stderr(&output)
        );
    }
}
