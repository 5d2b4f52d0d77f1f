//! How it is measured: rounds in which all sides of a comparison take turns.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::Outcome;

/// How often, and how long for each side.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) rounds: usize,
    pub(crate) lasting: Duration,
}

/// What one side did in one round.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    pub(crate) operations: u64,
    pub(crate) took: Duration,
    /// Nanoseconds of single operations; empty where only the rate is of interest.
    pub(crate) latencies: Vec<u64>,
}

impl Sample {
    /// Operations a second.
    #[expect(clippy::cast_precision_loss, reason = "counts of operations are far below 2^52")]
    pub(crate) fn rate(&self) -> f64 {
        self.operations as f64 / self.took.as_secs_f64().max(f64::MIN_POSITIVE)
    }
}

/// One side of a comparison.
pub(crate) trait Contender {
    /// Works for about this long.
    fn round(&mut self, lasting: Duration) -> Outcome<Sample>;

    /// Gives up what it holds, and says what went wrong until then.
    fn close(&mut self) -> Outcome<()> {
        Ok(())
    }
}

/// Works on one thread in steps of so many operations, until the time is up.
pub(crate) fn steadily(lasting: Duration, mut step: impl FnMut() -> Outcome<u64>) -> Outcome<Sample> {
    let started = Instant::now();
    let mut operations = 0;
    while started.elapsed() < lasting {
        operations += step()?;
    }
    Ok(Sample { operations, took: started.elapsed(), latencies: Vec::new() })
}

/// The product and what it is measured against.
pub(crate) struct Sides {
    pub(crate) product: Box<dyn Contender>,
    pub(crate) yardsticks: Vec<Box<dyn Contender>>,
}

impl Sides {
    pub(crate) fn close(&mut self) -> Outcome<()> {
        self.product.close()?;
        self.yardsticks.iter_mut().try_for_each(|yardstick| yardstick.close())
    }
}

/// What came out of a comparison.
#[derive(Debug)]
pub(crate) struct Compared {
    /// Operations a second of the product.
    pub(crate) rate: f64,
    /// Nanoseconds of the product's operations.
    pub(crate) latencies: Histogram<u64>,
    /// Of every yardstick: its operations a second, and the product's share of them.
    pub(crate) against: Vec<(f64, f64)>,
}

/// Lets all sides warm up, then take turns.
pub(crate) fn compare(sides: &mut Sides, pace: Pace) -> Outcome<Compared> {
    /// Lets a backend end what it does when it becomes idle, so that it is not on its neighbour's bill.
    const BREATH: Duration = Duration::from_millis(50);
    /// The longest latency that is told, in nanoseconds: a minute.
    const LONGEST: u64 = 60_000_000_000;
    let warm_up = pace.lasting.min(Duration::from_millis(500));
    sides.product.round(warm_up)?;
    for yardstick in &mut sides.yardsticks {
        yardstick.round(warm_up)?;
    }
    let mut latencies = Histogram::<u64>::new_with_bounds(1, LONGEST, 3)?;
    let mut rates = Vec::new();
    let mut against: Vec<(Vec<f64>, Vec<f64>)> = sides.yardsticks.iter().map(|_| (Vec::new(), Vec::new())).collect();
    for _ in 0..pace.rounds {
        std::thread::sleep(BREATH);
        let sample = sides.product.round(pace.lasting)?;
        let rate = sample.rate();
        rates.push(rate);
        for nanos in sample.latencies {
            latencies.saturating_record(nanos.max(1));
        }
        for (yardstick, (its_rates, ratios)) in sides.yardsticks.iter_mut().zip(&mut against) {
            std::thread::sleep(BREATH);
            let its_rate = yardstick.round(pace.lasting)?.rate();
            its_rates.push(its_rate);
            ratios.push(rate / its_rate.max(f64::MIN_POSITIVE));
        }
    }
    let against = against.into_iter().map(|(rates, ratios)| (median(rates), median(ratios))).collect();
    Ok(Compared { rate: median(rates), latencies, against })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = values.get(middle).copied().unwrap_or(0.0);
    if values.len() % 2 == 1 {
        return upper;
    }
    let lower = middle.checked_sub(1).and_then(|at| values.get(at)).copied().unwrap_or(upper);
    f64::midpoint(lower, upper)
}

/// Numbers that look random and are the same in every call: which run, which node.
#[derive(Debug, Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or(0) % bound.max(1)
    }
}
