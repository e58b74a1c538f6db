"""The labelled equations as mathematics: a title and LaTeX for each, which docs/equations.md shows above the docstring.

latex2mathml reads them when the site is built, GitHub when the page is looked at.
"""

from __future__ import annotations

#: By label. What a symbol means is at the head of the page.
FORMULAS = {
    "E1": ("Curvature of the short side", r"L \leftarrow \rho L + (1 - \rho)\, G G^T"),
    "E2": ("Bias correction of the curvature", r"\hat L = \frac{L}{1 - \rho^t}"),
    "E3": ("Tikhonov damping", r"\lambda = \max\left(\varepsilon,\ 10^{-4}\, \frac{\mathrm{tr}\, L}{d}\right)"),
    "E4": (
        "Adaptive rank",
        r"k = \min\left\{ j \in [k_{\min}, k_{\max}] : \sum_{i \le j} \lambda_i"
        r" \ge (1 - \epsilon_{\mathrm{sparse}}) \sum_i \lambda_i \right\}",
    ),
    "E5": (
        "Truncated factor with the full trace",
        r"\tilde L = U_k \Lambda_k U_k^T + \bar\lambda\, (I - U_k U_k^T), \qquad"
        r" \bar\lambda = \frac{\mathrm{tr}\, L - \mathrm{tr}\, \Lambda_k}{d - k}",
    ),
    "E6": (
        "Sketch of the long side",
        r"U_{\mathrm{new}}, S_{\mathrm{new}} = \mathrm{eig}_k\left(\gamma\, U S U^T + X^T X\right), \qquad X = \hat M",
    ),
    "E7": (
        "Second moments in a new basis",
        r"v \leftarrow \left(Q_{\mathrm{new}}^T Q_{\mathrm{old}}\right)^{\circ 2} v",
    ),
    "E8": (
        "Expected shares of a gradient's energy",
        r"s_i = (1 - s_0)\, \frac{\lambda_i}{\sum_{j \le k} \lambda_j}, \qquad"
        r" s_0 = \max\left(0.3,\ 1 - \frac{\sum_{j \le k} \lambda_j}{\mathrm{tr}}\right)",
    ),
    "U1": ("End of phase 1", r"t_1 = \max(\mathrm{warmup},\ \mathrm{updates} \cdot \mathrm{freq})"),
    "U2": (
        "Ramp",
        r"w_t = \min\left(1,\ \frac{\max(0,\ t - t_1)}{\mathrm{blend} + 1}\right)",
    ),
    "U3": (
        "Bound on a gradient's magnitude",
        r"G \leftarrow G\, \min\left(1,\ \frac{10\, c}{\max |G|}\right), \qquad c \leftarrow \max(0.95\, c,\ \max |G|)",
    ),
    "U4": (
        "Adam's moments",
        r"m \leftarrow \beta_1 m + (1 - \beta_1) G, \qquad v \leftarrow \beta_2 v + (1 - \beta_2)\, G^{\circ 2}",
    ),
    "U5": ("Bias corrections", r"\hat m = \frac{m}{1 - \beta_1^t}, \qquad \hat v = \frac{v}{1 - \beta_2^t}"),
    "U6": ("AdamW's step", r"D = \frac{\hat m}{\sqrt{\hat v} + \varepsilon}"),
    "U7": (
        "The published preconditioner",
        r"D = L^{-1/4}\, G\, R^{-1/4}, \qquad L^{-1/4} = t^{-1/4} I + U \left(S^{-1/4} - t^{-1/4}\right) U^T",
    ),
    "U8": ("Bound on a step's norm", r"D \leftarrow D\, \min\left(1,\ \frac{\tau}{\|D\|_F}\right)"),
    "U9": ("Mixture on the ramp", r"D = (1 - w_t)\, D_{\mathrm{AdamW}} + w_t\, D_{\mathrm{SCAO}}"),
    "U10": (
        "Step with a second moment of rank one",
        r"D_{ij} = \frac{\hat m_{ij}}{\sqrt{\hat v_{ij}} + \varepsilon}, \qquad"
        r" v_{ij} = (\mathrm{row}_i + \delta) \left(\frac{\mathrm{col}_j}{\mathrm{mean}(\mathrm{col})} + 10^{-3}\right), \qquad"
        r" |D_{ij}| \le 1",
    ),
    "U11": (
        "Adam in the eigenbasis",
        r"P = Q^T G\, U, \quad R = Q^T G - P U^T, \qquad"
        r" D = Q \left( \frac{\hat P}{\sqrt{\hat v_P} + \varepsilon}\, U^T"
        r" + \frac{\hat R}{\sqrt{\hat v_R} + \varepsilon} \right)",
    ),
    "U12": ("AdamW's second moment from the curvature", r"v_i = \frac{(1 - \beta_2^t)\, \hat L_{ii}}{l}"),
    "U13": (
        "Steps of AdamW's size",
        r"D \leftarrow g D, \qquad g = \frac{\|D_{\mathrm{AdamW}}\|_F}{\|D\|_F} \in \left[\tfrac{1}{2},\ 2\right]",
    ),
    "U14": ("Damping", r"\delta = 10^{-3} \sum_i v_i"),
    "U15": (
        "Change to new bases",
        r"M \leftarrow Q_{\mathrm{new}}^T\, m\, (I - U_{\mathrm{new}} U_{\mathrm{new}}^T), \qquad"
        r" U \leftarrow U_{\mathrm{new}}, \qquad \begin{pmatrix} M \\ U^T \end{pmatrix} = C \begin{pmatrix} U_{\mathrm{old}}^T"
        r" \\ M_{\mathrm{old}} \end{pmatrix}",
    ),
    "U16": (
        "Cautious steps",
        r"D_{ij} \leftarrow \begin{cases} D_{ij} / \max(a, \tfrac{1}{2}) & D_{ij} G_{ij} > 0 \\"
        r" 0 & \text{otherwise} \end{cases}",
    ),
    "O1": (
        "Momentum a step ahead",
        r"M \leftarrow \beta_1 M + (1 - \beta_1) G, \qquad X = \beta_1 M + (1 - \beta_1) G",
    ),
    "O2": ("Polar factor", r"X \leftarrow (X X^T)^{-1/2} X"),
    "O3": (
        "Equalised columns",
        r"c_j \leftarrow \beta_2 c_j + (1 - \beta_2)\, \frac{1}{r} \sum_i X_{ij}^2, \qquad"
        r" D_{ij} = \frac{X_{ij}}{\sqrt{\hat c_j} + \varepsilon}",
    ),
    "O4": ("Steps of a fixed size", r"D \leftarrow D\, \frac{\sqrt{r l}}{16}\, \frac{\|X\|_F}{\|D\|_F}"),
    "O5": (
        "Random weights",
        r"F = \frac{\max\left(n\, \mathrm{var}_i\, \overline{S_{i \cdot}},\ m\, \mathrm{var}_j\, \overline{S_{\cdot j}}\right)}"
        r"{\mathrm{var}\, S} < 2, \qquad S_{ij} = W_{ij}^2",
    ),
    "S1": ("When a matrix is refreshed", r"(t - t_1) \bmod \mathrm{freq} = \mathrm{slot}"),
    "X1": ("Experts as a stack", r"A_e \in \mathbb{R}^{r \times l}, \qquad e = 1, \ldots, E"),
    "X2": ("Grouped LoRA", r"y = x W_e + s\, (x A_e^T)\, B_e"),
    "X3": (
        "Experts that are idle in some steps",
        r"n \leftarrow n + a, \qquad w \leftarrow \beta_2 w + (1 - \beta_2)\, a",
    ),
}
