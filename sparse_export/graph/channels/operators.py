"""Names of operators of ONNX, by what they do to channels."""

from __future__ import annotations

__all__ = ["ELEMENTWISE", "ONE_TO_ONE", "POOLS", "REDUCE"]

ONE_TO_ONE = frozenset(
    (
        *("Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor"),
        *("Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg"),
        *("Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign"),
        *("Sqrt", "Tanh", "ThresholdedRelu"),
    )
)
REDUCE = frozenset(
    (
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
        *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    )
)
ELEMENTWISE = (ONE_TO_ONE - {"Cast", "Identity", "Dropout"}) | frozenset(
    (
        *("Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum", "Mod", "Where"),
        *("And", "Or", "Xor", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("Shrink", "Swish", "IsNaN", "IsInf", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh"),
        *("Sinh", "Cosh", "Tan", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"),
    )
)
POOLS = frozenset(("AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"))
