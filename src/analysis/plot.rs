//! The number of reasoning features of each layer as a picture.

use plotters::prelude::*;

use super::Features;
use crate::error::{Error, Result};

const SIZE: (u32, u32) = (900, 480);
const COLOURS: [RGBColor; 2] = [RGBColor(66, 106, 180), RGBColor(214, 126, 44)];

/// An SVG image: bars for each named model's layers, and its fitted mixture as a line.
///
/// # Errors
/// A model without layers.
pub fn svg(models: &[(String, &Features)]) -> Result<String> {
    let failed = |what: String| Error::operand("plot", "a picture", what);
    let counts = models.iter().flat_map(|(_, features)| features.counts());
    let (mut last, mut most) = (0, 1);
    for (layer, count) in counts {
        (last, most) = (last.max(layer), most.max(count));
    }
    let mut image = String::new();
    {
        let root = SVGBackend::with_string(&mut image, SIZE).into_drawing_area();
        draw(&root, models, last, most).map_err(|e| failed(e.to_string()))?;
        root.present().map_err(|e| failed(e.to_string()))?;
    }
    Ok(image)
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(
    root: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    models: &[(String, &Features)],
    last: usize,
    most: usize,
) -> Drawn {
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(root)
        .margin(12)
        .caption("Reasoning features by layer", ("sans-serif", 20))
        .x_label_area_size(44)
        .y_label_area_size(60)
        .build_cartesian_2d(-0.5..last as f64 + 0.5, 0.0..most as f64 * 1.15)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc("layer")
        .y_desc("reasoning features")
        .x_labels(last.min(30) + 2)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .draw()?;
    let width = 0.8 / models.len().max(1) as f64;
    for (i, ((name, features), colour)) in models.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let left = -0.4 + width * i as f64;
        let bars = features.counts().into_iter().map(|(layer, count)| {
            let x = layer as f64 + left;
            Rectangle::new(
                [(x, 0.0), (x + width, count as f64)],
                colour.mix(0.6).filled(),
            )
        });
        let colour = *colour;
        chart
            .draw_series(bars)?
            .label(name.as_str())
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], colour.filled()));
        if let Some(mixture) = &features.mixture {
            // One layer is one wide, so that the density times all features is a layer's share.
            let all: usize = features.counts().iter().map(|c| c.1).sum();
            let points = (0..=last * 20).map(|i| {
                let x = i as f64 / 20.0;
                (x, mixture.density(x) * all as f64)
            });
            chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.9))
        .draw()?;
    Ok(())
}
